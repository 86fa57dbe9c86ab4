"""Methods that choose once per prompt (base.py says what that means); they run trained models and do not train."""
