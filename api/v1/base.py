"""What every view of the REST API shares."""

from rest_framework.views import APIView

from api.throttling import CallerThrottle


class View(APIView):
    """An operation of /api/v1."""

    throttle_classes = (CallerThrottle,)
