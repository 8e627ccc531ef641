"""From text to token files and back: tokenizers, sources, readers, and a folder per data set."""
