"""What evaluate.py and llama_inference.py share: where a model and its text come from, and how it generates."""
