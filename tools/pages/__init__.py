"""The Markdown pages: their code, commands and links; the site; a page that a command writes."""
