from .encoder import EncoderRecipe as EncoderRecipe
from .encoder import train_encoder as train_encoder
from .segmenter import Recipe as Recipe
from .segmenter import train_segmenter as train_segmenter
