"""From text to token files and back: sources, tokenizers, readers, and a folder per data set."""
