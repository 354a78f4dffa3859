"""What the scheduler serves over HTTP: metrics for machines, a status page for people."""

from insitu_scheduler.web.http_server import HttpServer
from insitu_scheduler.web.status_page import StatusPage

__all__ = ["HttpServer", "StatusPage"]
