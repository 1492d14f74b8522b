"""How the embedded model was made: `sample` reviews from SmolLM2, `clean` them, `train` on what is left."""
