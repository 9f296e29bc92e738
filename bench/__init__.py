"""How fast is it? Run python -m bench."""
