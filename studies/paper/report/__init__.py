"""What is made of the study's numbers: tables, plots and pages. No number comes from here."""
