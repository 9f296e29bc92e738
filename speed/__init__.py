"""The same model, faster or smaller: drafts, 8 and 4 bits."""
