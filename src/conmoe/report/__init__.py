"""Results for people: the model card."""
