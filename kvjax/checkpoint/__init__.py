"""Checkpoints: Hugging Face safetensors and GGUF in, Orbax in and out."""
