"""Sends records with python-logging-loki, and reads them as Loki's documentation of its API shows it. Each result is a line of JSON."""

import json
import logging
import os
from queue import Queue

import logging_loki
import requests

url = os.environ["LOKI"]
logging.raiseExceptions = True
handler = logging_loki.LokiQueueHandler(Queue(-1), url=url + "/loki/api/v1/push", tags={"app": "python"}, version="1")
logger = logging.getLogger("shop")
logger.setLevel(logging.DEBUG)
logger.addHandler(handler)
for n in range(5):
    logger.info("order %d shipped", n, extra={"tags": {"part": "a"}})
logger.error("order 5 lost: ✗")
handler.listener.stop()


def get(path, **params):
    response = requests.get(url + "/loki/api/v1/" + path, params=params, timeout=30)
    response.raise_for_status()
    return response.json()["data"]


def show(what, result):
    print(json.dumps({"what": what, "result": result}))


show("values", get("label/severity/values"))
lines = get("query_range", query='{app="python"}', limit=10)["result"]
show("lines", sorted(value[1] for stream in lines for value in stream["values"]))
show("rate", get("query", query='sum by (severity) (count_over_time({app="python"}[1h]))')["result"][0]["metric"])
