"""Sensitivity: Jacobians, curvature, entropy and attributions."""
