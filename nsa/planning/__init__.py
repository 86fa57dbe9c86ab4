"""What a run will need before it runs: arithmetic (forecast.py), the compiler's view (topology.py), plans of both."""
