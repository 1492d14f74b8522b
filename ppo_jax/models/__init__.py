"""The transformer: `decoder` (the one model), `families` (Hugging Face configs and names as data), `hf_io` (files)."""
