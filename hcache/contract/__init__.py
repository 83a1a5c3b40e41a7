"""What every compression method must do, as tests over `cases.CASES`; needs pytest.

They are part of the package so that a method of your own can be held to them: `python -m hcache.check_method
./mine.py`.
"""
