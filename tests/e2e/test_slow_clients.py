"""Clients that send slowly hold threads, and the pages are answered beside them."""

import socket
from urllib.parse import urlsplit

import httpx

from tests.hubs import Hub

SLOW_CLIENTS = 20


def test_the_hub_answers_while_twenty_clients_send_their_uploads_byte_by_byte(hub: Hub):
    place = urlsplit(hub.url)
    head = (
        f"POST /api/v1/uploads HTTP/1.1\r\nHost: {place.netloc}\r\nAuthorization: Bearer {hub.api_key}\r\n"
        "Content-Type: application/json\r\nContent-Length: 5000\r\n\r\n{"
    )
    waiting = []
    try:
        for _ in range(SLOW_CLIENTS):
            waiting.append(socket.create_connection((place.hostname, place.port)))
            waiting[-1].sendall(head.encode())
        for _ in range(5):
            assert httpx.get(f"{hub.url}/healthz", timeout=20, trust_env=False).status_code == 200
    finally:
        for each in waiting:
            each.close()
