"""The port of the agent that Ray starts with each node."""

import functools

from ray._private import parameter


def any_agent_port() -> None:
    """Have each node that `ray.init` starts in this process take a free port for its agent.

    By default all take the same, so that a cluster beside another one, or soon after it, tries for seconds."""
    parameter.RayParams = functools.partial(parameter.RayParams, dashboard_agent_listen_port=0)
