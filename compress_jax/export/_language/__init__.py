"""Compressed language models as others read them: GGUF, and folders of Hugging Face."""
