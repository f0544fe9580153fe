"""`python -m ulr_snn`: the command line without its installed script."""

from ulr_snn.runs.cli import main

raise SystemExit(main())
