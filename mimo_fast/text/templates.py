"""Wordings of requests: those that MiMo-Audio-Instruct was tuned with, and those by example.

Data from upstream, src/mimo_audio/templates.py.
"""

CONVERSIONS = {
    "voice": "Convert the timbre of the input speech to target timbre.",
    "emotion": "Convert the emotion of the input speech to target emotion.",
    "style": "Convert the speaking style of the input speech to target style.",
    "speed": "Convert the speed of the input speech to target speed.",
    "denoise": "Remove the noise from the input speech.",
    "translation": "Translate the input speech into the target language.",
}
"""Instructions of speech to speech by example, by what is converted.

The voice's is upstream's (inference_example_pretrain.py). The others are in its manner: upstream's
evaluation of these kinds gives the base model examples and no instruction.
"""

ASR_TEMPLATES_IN = {
    "zh": (
        "请将这段语音转换为文字",
        "帮我识别这个音频文件中的内容",
        "把这段录音转成文本",
        "请转录这段语音",
        "将音频内容转换成文字格式",
        "识别并转写这段语音",
        "把语音内容写成文字",
        "转录这个音频片段",
        "将这段对话转换为文本",
        "麻烦帮我把这段录音整理成详细的文字记录",
    ),
    "en": (
        "Please transcribe this audio file",
        "Convert this speech recording to text",
        "Transcribe the following voice message",
        "Turn this audio into readable text",
        "Please convert the recording to written format",
        "Transcribe what you hear in this audio",
        "Convert this spoken content to text",
        "Please write down what is said in this recording",
        "Transcribe this voice recording",
        "Could you please help me transcribe this important recording?",
        "Would you mind converting this voice message into a readable text format?",
        "I'd really appreciate it if you could turn this audio file into a written document",
    ),
}

ASR_TEMPLATES = ASR_TEMPLATES_IN["zh"] + ASR_TEMPLATES_IN["en"]

TTS_TEMPLATES = {
    "zh": (
        "请将这段文字转换为语音",
        "帮我把这个文本读出来",
        "将这些文字生成音频",
        "请朗读这段内容",
        "把这段话转换成语音文件",
        "生成这段文字的语音版本",
        "请用语音播报这些内容",
        "将文本转换为可听的音频",
        "帮我朗读这段文字",
        "把这些内容念出来",
    ),
    "en": (
        "Please convert this text to speech",
        "Turn this writing into audio",
        "Generate speech from this text",
        "Read this content out loud",
        "Convert these words to voice",
        "Create an audio version of this text",
        "Please vocalize this content",
        "Turn this text into audible format",
        "Help me convert this writing to speech",
        "Make this text into spoken audio",
    ),
}
