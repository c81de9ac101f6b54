"""`kronsae export`: SAEs for other libraries and the Hugging Face hub."""
