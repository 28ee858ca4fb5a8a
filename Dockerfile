# One image for every process of the hub; docker-compose.yml says which of them a container runs.
FROM python:3.12-slim-bookworm

# OpenMP is what torch and faiss share; nothing else is missing in the slim image.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
# The environment is made by the code that bin/run uses, before the rest of the checkout is copied: it changes rarely.
COPY requirements.in requirements.txt requirements-dev.in requirements-dev.txt ./
COPY local/__init__.py local/install.py local/
RUN PYTHONPATH=/app python -P -c "from local import install; install.ensure(need='run')"

COPY . .
ENV PATH=/app/.venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 DJANGO_SETTINGS_MODULE=config.settings
RUN useradd --system --uid 10001 --home-dir /data --create-home hub
USER hub
EXPOSE 8000
CMD ["gunicorn", "config.wsgi:application", "--bind", "0.0.0.0:8000", "--worker-class", "gthread", "--workers", "2", "--threads", "16", "--no-control-socket", "--graceful-timeout", "10"]
