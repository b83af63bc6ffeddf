"""The image sets of the study, each out of a package of a registry, with its licence and hash."""
