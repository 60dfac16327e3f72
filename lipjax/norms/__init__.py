"""How large a masked layer is: estimates and upper bounds of spectral norms."""
