"""Attention with tangents: the public function, the paths that compute it, their derivatives."""
