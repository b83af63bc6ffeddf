"""The parts of the study: each says what is to be run, and runs one piece of it."""
