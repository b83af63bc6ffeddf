"""What is measured and tested when a GPU is at hand: four commands, each with one archive."""
