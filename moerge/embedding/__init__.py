"""Text to unit vectors. What the encoder is called stands here, so that nobody needs torch to know it."""

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# Vectors of two encoders are never compared, so the id names the weights and not only the model.
ENCODER_ID = f"{MODEL}@{WEIGHTS_SHA256[:12]}"
DIMENSION = 384
MAX_TOKENS = 256
