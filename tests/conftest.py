"""What the tests share: property tests without deadlines, since the first call of a kernel compiles it."""

from hypothesis import HealthCheck, settings

settings.register_profile("kernels", deadline=None, suppress_health_check=[
    HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large])
settings.load_profile("kernels")
