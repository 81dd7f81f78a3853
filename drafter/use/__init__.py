"""What a model was used for: texts that chat and serve keep with `--learn`, and training sets made of them."""
