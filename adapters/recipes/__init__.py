"""How the shipped adapters are made and scored: synthetic data, QLoRA training on CPU, a scorer through the server."""
