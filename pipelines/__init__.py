"""The only place that knows Prefect and DVC's API. It holds no value and no algorithm: flows, and what they share."""

import os

# nothing here reports home; a run that no longer beats is found within a minute or two. Read by prefect and dvc when
# they are imported, so before they are
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}.items():
    os.environ.setdefault(_name, _value)
