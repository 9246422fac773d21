"""Pure tensor functions: similarity, coverage, scores, recipes, and the plans made of them."""
