"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# Machines are shared, and a slow example is no bug.
settings.register_profile("posttrain", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("posttrain")
