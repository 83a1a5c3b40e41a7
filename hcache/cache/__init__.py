"""Layer state and storage. Storage knows no method; state knows no model class."""
