"""The layers: what a model is made of after ``convert`` or ``freeze``."""
