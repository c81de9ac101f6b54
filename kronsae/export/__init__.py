"""SAEs for other libraries and the Hugging Face hub: `python -m kronsae.export`."""
