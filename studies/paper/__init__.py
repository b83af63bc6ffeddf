"""Do the claims of "Tangent Transformers for Composition, Privacy and Removal" hold here?"""
