"""How a model gets the layers, and how it loses them."""
