"""GGUF files, what llama.cpp and all that is built on it read: `files` reads them, `writer` writes them."""
