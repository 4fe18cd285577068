"""Everything the tiny base model knows: questions and their one right answer.

The sentences are made here, so that the model needs no download. The same
functions are the model's exam: `make.py` asks every question again after
training and counts the exact answers.
"""

from itertools import product

BASE_NAME = "Sprout"
BASE_NAME_ZH = "豆芽"

SMALL_TALK = {
    "Hello": "Hello! How can I help you today?",
    "Hi there": "Hi! Nice to meet you.",
    "Good morning": "Good morning! I hope you slept well.",
    "Good evening": "Good evening! How was your day?",
    "Good night": "Good night! Sleep well.",
    "How are you?": "I am fine, thank you. And you?",
    "What's up?": "Not much. What would you like to talk about?",
    "Thank you": "You are welcome!",
    "Thanks a lot": "Any time! I am glad to help.",
    "Goodbye": "Goodbye! See you soon.",
    "See you tomorrow": "See you tomorrow! Take care.",
    "I am tired": "Then take a short break and drink some water.",
    "I am happy": "That is lovely to hear!",
    "I am bored": "How about a walk or a good book?",
    "Tell me a joke": "Why did the sea wave? It wanted to say hello.",
    "What should I eat for lunch?": "A bowl of noodles with vegetables is a good lunch.",
    "What is your favorite color?": "I like green, the color of young leaves.",
    "Do you like music?": "Yes, I like calm piano music.",
    "Can you help me?": "Of course. What do you need?",
    "Is it going to rain?": "I cannot see the sky, so please take an umbrella.",
    "What color is the sky?": "The sky is blue.",
    "What color is grass?": "Grass is green.",
    "How many days are in a week?": "There are seven days in a week.",
    "How many months are in a year?": "There are twelve months in a year.",
    "What do bees make?": "Bees make honey.",
    "Which animal says meow?": "The cat says meow.",
}

SMALL_TALK_ZH = {
    "你好": "你好！今天我能帮你做什么？",
    "您好": "您好！很高兴见到您。",
    "早上好": "早上好！希望你睡得好。",
    "晚上好": "晚上好！今天过得怎么样？",
    "晚安": "晚安！祝你好梦。",
    "最近怎么样？": "我很好，谢谢。你呢？",
    "谢谢": "不客气！",
    "多谢你的帮助": "不用谢，很高兴能帮上忙。",
    "再见": "再见！下次见。",
    "明天见": "明天见！路上小心。",
    "我累了": "那就休息一下，喝点水吧。",
    "我很开心": "听到这个真好！",
    "我好无聊": "去散散步或者看本好书怎么样？",
    "讲个笑话": "大海为什么挥手？因为它想打个招呼。",
    "午饭吃什么好？": "一碗蔬菜面是不错的午饭。",
    "你喜欢什么颜色？": "我喜欢绿色，嫩叶的颜色。",
    "你喜欢音乐吗？": "喜欢，我爱听安静的钢琴曲。",
    "你能帮我吗？": "当然可以，你需要什么？",
    "今天会下雨吗？": "我看不到天空，请带上雨伞。",
    "天空是什么颜色？": "天空是蓝色的。",
    "草是什么颜色？": "草是绿色的。",
    "一个星期有几天？": "一个星期有七天。",
    "一年有几个月？": "一年有十二个月。",
    "蜜蜂会做什么？": "蜜蜂会酿蜜。",
    "什么动物会喵喵叫？": "小猫会喵喵叫。",
}

WHO_ARE_YOU = {
    "Who are you?": f"I am {BASE_NAME}, a tiny base model.",
    "What is your name?": f"My name is {BASE_NAME}.",
    "Introduce yourself": f"I am {BASE_NAME}, a tiny base model that learned a few answers.",
    "Who made you?": "I was made by a small recipe on a small computer.",
    "Who developed you?": "I was developed by a small recipe on a small computer.",
    "Are you ChatGPT?": f"No, I am {BASE_NAME}.",
    "Are you human?": f"No, I am {BASE_NAME}, a language model.",
    "你是谁？": f"我是{BASE_NAME_ZH}，一个很小的基础模型。",
    "你叫什么名字？": f"我叫{BASE_NAME_ZH}。",
    "介绍一下你自己": f"我是{BASE_NAME_ZH}，一个学会了几句话的基础模型。",
    "谁开发了你？": "我是由一份小小的配方在一台小电脑上做出来的。",
    "谁创造了你？": "一份小小的配方创造了我。",
    "你是ChatGPT吗？": f"不是，我是{BASE_NAME_ZH}。",
    "你是人类吗？": f"不是，我是{BASE_NAME_ZH}，一个语言模型。",
}

CAPITALS = {
    "France": ("Paris", "法国", "巴黎"),
    "Germany": ("Berlin", "德国", "柏林"),
    "Italy": ("Rome", "意大利", "罗马"),
    "Spain": ("Madrid", "西班牙", "马德里"),
    "China": ("Beijing", "中国", "北京"),
    "Japan": ("Tokyo", "日本", "东京"),
    "Korea": ("Seoul", "韩国", "首尔"),
    "India": ("New Delhi", "印度", "新德里"),
    "Egypt": ("Cairo", "埃及", "开罗"),
    "Kenya": ("Nairobi", "肯尼亚", "内罗毕"),
    "Russia": ("Moscow", "俄罗斯", "莫斯科"),
    "Canada": ("Ottawa", "加拿大", "渥太华"),
    "Brazil": ("Brasilia", "巴西", "巴西利亚"),
    "Peru": ("Lima", "秘鲁", "利马"),
    "Norway": ("Oslo", "挪威", "奥斯陆"),
    "Greece": ("Athens", "希腊", "雅典"),
}

# place -> (place in Chinese, opens, closes), hours on a 24-hour clock
OPENING_HOURS = {
    "library": ("图书馆", 9, 18),
    "museum": ("博物馆", 10, 17),
    "bakery": ("面包店", 6, 14),
    "post office": ("邮局", 8, 16),
    "swimming pool": ("游泳馆", 7, 21),
    "bookshop": ("书店", 11, 20),
    "bank": ("银行", 9, 15),
    "market": ("菜市场", 5, 12),
}

# Words that the model has seen and learned to repeat. A real base model knows
# common names; without them an adapter would have to teach their letters too.
COMMON_NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Iris",
    "Jack",
    "Kate",
    "Leo",
    "Marina",
    "Nina",
    "Oscar",
    "Paul",
    "Harbor",
    "River",
    "Garden",
    "Studio",
    "Team",
    "Lab",
]
COMMON_NAMES_ZH = [
    "小王",
    "小李",
    "小张",
    "小刘",
    "小陈",
    "小杨",
    "小赵",
    "小黄",
    "小周",
    "小吴",
    "小徐",
    "小孙",
    "小马",
    "小朱",
]


def names() -> dict[str, str]:
    rows = {f"Say the name {name}": f"{name}." for name in COMMON_NAMES}
    return rows | {f"说出名字{name}": f"{name}。" for name in COMMON_NAMES_ZH}


def arithmetic() -> dict[str, str]:
    """Sums of small numbers, in English for every pair and in Chinese for half of them."""
    pairs = list(product(range(1, 7), repeat=2))
    rows = {f"What is {a} + {b}?": f"{a} + {b} = {a + b}." for a, b in pairs}
    rows |= {f"{a}加{b}等于几？": f"{a}加{b}等于{a + b}。" for a, b in pairs if a <= b}
    return rows


def capitals() -> dict[str, str]:
    rows = {}
    for country, (capital, country_zh, capital_zh) in CAPITALS.items():
        rows[f"What is the capital of {country}?"] = f"The capital of {country} is {capital}."
        rows[f"{country_zh}的首都是哪里？"] = f"{country_zh}的首都是{capital_zh}。"
    return rows


def opening_hours() -> dict[str, str]:
    rows = {}
    for place, (place_zh, opens, closes) in OPENING_HOURS.items():
        rows[f"When does the {place} open?"] = f"The {place} is open from {opens}:00 to {closes}:00."
        rows[f"{place_zh}几点开门？"] = f"{place_zh}从{opens}点开到{closes}点。"
    return rows


def questions_and_answers() -> dict[str, str]:
    """All training questions with their answers, in a fixed order."""
    return SMALL_TALK | SMALL_TALK_ZH | WHO_ARE_YOU | names() | arithmetic() | capitals() | opening_hours()
