"""Settings of the hub.

Every value that an operator may change is read through config/env.py and described in docs/settings.md.
"""

from pathlib import Path

from config import env

ROOT = Path(__file__).resolve().parent.parent
VERSION = "0.1.0"

# Where and who
HUB_HOME = env.path("HUB_HOME", ROOT / "var")
HUB_BLOBS_DIR = env.path("HUB_BLOBS_DIR", HUB_HOME / "blobs")
HUB_STAGING_DIR = env.path("HUB_STAGING_DIR", HUB_HOME / "staging")
HUB_BASES_DIR = env.path("HUB_BASES_DIR", HUB_HOME / "bases")
HUB_STORAGE = env.text("HUB_STORAGE", "local")
HUB_DEBUG = env.flag("HUB_DEBUG", default=False)
DEVELOPMENT_SECRET = "development-only-not-secret"  # noqa: S105 - known to all, and refused by the web process
SECRET_KEY = env.text("HUB_SECRET_KEY", DEVELOPMENT_SECRET)
DEBUG = HUB_DEBUG
ALLOWED_HOSTS = env.listing("HUB_ALLOWED_HOSTS", "*")
CSRF_TRUSTED_ORIGINS = env.listing("HUB_TRUSTED_ORIGINS")
HUB_TRUST_PROXY = env.flag("HUB_TRUST_PROXY", default=False)
if HUB_TRUST_PROXY:
    USE_X_FORWARDED_HOST = True
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

# The API key by which the demo experts are uploaded
HUB_SEED_KEY = env.text("HUB_SEED_KEY")

# The router process
HUB_ROUTER_URL = env.text("HUB_ROUTER_URL", "http://127.0.0.1:8100")
HUB_ROUTER_SECRET = env.text("HUB_ROUTER_SECRET", DEVELOPMENT_SECRET)
HUB_ROUTER_TIMEOUT_SECONDS = env.number("HUB_ROUTER_TIMEOUT_SECONDS", 10)
HUB_ROUTER_MAX_WAITING_TEXTS = env.number("HUB_ROUTER_MAX_WAITING_TEXTS", 256)
HUB_OVERLAY_MAX_EXPERTS = env.number("HUB_OVERLAY_MAX_EXPERTS", 1000)

# A language model that writes instructions for experts that have none
HUB_DESCRIBE_URL = env.text("HUB_DESCRIBE_URL")
HUB_DESCRIBE_MODEL = env.text("HUB_DESCRIBE_MODEL")
HUB_DESCRIBE_KEY = env.text("HUB_DESCRIBE_KEY")
HUB_EGRESS_HOSTS = env.listing("HUB_EGRESS_HOSTS")

# Limits of what is taken in
HUB_UPLOAD_MAX_BYTES = env.number("HUB_UPLOAD_MAX_BYTES", 4 * 2**30)
HUB_FILE_MAX_BYTES = env.number("HUB_FILE_MAX_BYTES", 4 * 2**30)
HUB_UPLOAD_MAX_FILES = env.number("HUB_UPLOAD_MAX_FILES", 256)
HUB_NAMESPACE_MAX_BYTES = env.number("HUB_NAMESPACE_MAX_BYTES", 200 * 2**30)
HUB_UPLOAD_SESSION_HOURS = env.number("HUB_UPLOAD_SESSION_HOURS", 168)
HUB_HEADER_MAX_BYTES = env.number("HUB_HEADER_MAX_BYTES", 16 * 2**20)
HUB_TENSORS_MAX_COUNT = env.number("HUB_TENSORS_MAX_COUNT", 200_000)
HUB_JSON_MAX_BYTES = env.number("HUB_JSON_MAX_BYTES", 1 * 2**20)
HUB_GARBAGE_GRACE_SECONDS = env.number("HUB_GARBAGE_GRACE_SECONDS", 8 * 24 * 3600)
HUB_MERGE_MAX_EXPERTS = env.number("HUB_MERGE_MAX_EXPERTS", 32)
HUB_MERGE_MAX_QUEUED = env.number("HUB_MERGE_MAX_QUEUED", 20)
HUB_MERGE_MAX_RUNNING = env.number("HUB_MERGE_MAX_RUNNING", 2)
HUB_MERGE_MAX_SECONDS = env.number("HUB_MERGE_MAX_SECONDS", 1800)
HUB_MERGE_KEEP_DAYS = env.number("HUB_MERGE_KEEP_DAYS", 30)
HUB_MERGE_MEMORY_BYTES = env.number("HUB_MERGE_MEMORY_BYTES", 2 * 2**30)
HUB_MERGE_UNKNOWN_LICENCES = env.text("HUB_MERGE_UNKNOWN_LICENCES", "warn")
HUB_KINSHIP_MAX_VALUES = env.number("HUB_KINSHIP_MAX_VALUES", 50 * 10**9)
HUB_PACK_MAX_EXPERTS = env.number("HUB_PACK_MAX_EXPERTS", 64)
HUB_PACK_MAX_BYTES = env.number("HUB_PACK_MAX_BYTES", 256 * 2**20)
HUB_COMPRESS_MAX_QUEUED = env.number("HUB_COMPRESS_MAX_QUEUED", 40)
HUB_HOLD_SECONDS = env.number("HUB_HOLD_SECONDS", 5)
HUB_RATE_LIMITS = env.flag("HUB_RATE_LIMITS", default=True)
HUB_RATE_API_PER_MINUTE = env.number("HUB_RATE_API_PER_MINUTE", 6000)
HUB_RATE_ANONYMOUS_PER_MINUTE = env.number("HUB_RATE_ANONYMOUS_PER_MINUTE", 1200)
HUB_RATE_LOGIN_PER_5_MINUTES = env.number("HUB_RATE_LOGIN_PER_5_MINUTES", 10)

# Jobs
HUB_JOB_LEASE_SECONDS = env.number("HUB_JOB_LEASE_SECONDS", 60)
HUB_JOB_HEARTBEAT_SECONDS = env.number("HUB_JOB_HEARTBEAT_SECONDS", 15)
HUB_JOB_SWEEP_SECONDS = env.number("HUB_JOB_SWEEP_SECONDS", 30)
HUB_JOB_MAX_ATTEMPTS = env.number("HUB_JOB_MAX_ATTEMPTS", 5)
HUB_JOB_MAX_SECONDS = env.number("HUB_JOB_MAX_SECONDS", 3600)
HUB_DEVICE = env.text("HUB_DEVICE", "auto")

INSTALLED_APPS = [
    "registry",
    "api",
    "frontend",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django.contrib.postgres",
    "django_htmx",
    "rest_framework",
    "drf_spectacular",
]
MIDDLEWARE = [
    "config.middleware.RequestContext",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "config.middleware.NoNul",
]
ROOT_URLCONF = "config.urls"
WSGI_APPLICATION = "config.wsgi.application"
APPEND_SLASH = False
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

DATABASES = {"default": env.database()}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
AUTH_USER_MODEL = "registry.User"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
LOGIN_URL = "/login"
LOGIN_REDIRECT_URL = "/"
LOGOUT_REDIRECT_URL = "/"

LANGUAGE_CODE = "en-gb"
TIME_ZONE = "UTC"
USE_I18N = False
USE_TZ = True

STATIC_URL = "/static/"
STATIC_ROOT = HUB_HOME / "static"
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
}
# Files of the apps are served as they lie, so that nothing has to be collected before the first page.
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = False

SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_SECURE = env.flag("HUB_HTTPS", default=False)
CSRF_COOKIE_SECURE = SESSION_COOKIE_SECURE
CSRF_COOKIE_SAMESITE = "Lax"
SECURE_CONTENT_TYPE_NOSNIFF = True
X_FRAME_OPTIONS = "DENY"
DATA_UPLOAD_MAX_MEMORY_SIZE = HUB_JSON_MAX_BYTES

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "api.authentication.KeyAuthentication",
        "rest_framework.authentication.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.AllowAny"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["api.json_parser.JsonParser"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "api.problems.handle",
    "UNAUTHENTICATED_USER": "django.contrib.auth.models.AnonymousUser",
    # `?format=` is an operation's own parameter here.
    "URL_FORMAT_OVERRIDE": None,
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Moerge",
    "DESCRIPTION": "Catalogue, compress, route and merge small experts.",
    "VERSION": VERSION,
    "SERVE_INCLUDE_SCHEMA": False,
    "COMPONENT_SPLIT_REQUEST": True,
    "ENUM_GENERATE_CHOICE_DESCRIPTION": False,
}

CELERY_BROKER_URL = env.text("BROKER_URL", "redis://127.0.0.1:6379/0")

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"context": {"()": "registry.telemetry.ContextFilter"}},
    "formatters": {"json": {"()": "registry.telemetry.JSONFormatter"}},
    "handlers": {
        "stderr": {"class": "logging.StreamHandler", "formatter": "json", "filters": ["context"]},
    },
    "root": {"handlers": ["stderr"], "level": env.text("HUB_LOG_LEVEL", "INFO")},
    "loggers": {
        "django.request": {"level": "ERROR"},
        "django.server": {"level": "WARNING"},
        "faiss.loader": {"level": "WARNING"},  # it tells which processor it does not find
        "httpx": {"level": "WARNING"},
        "httpcore": {"level": "WARNING"},
    },
}
SILENCED_SYSTEM_CHECKS: list[str] = []
