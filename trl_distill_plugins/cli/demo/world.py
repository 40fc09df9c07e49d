"""The words of the demo's world: what customers write about, how they write it, and who could take care of it."""

TOPICS: dict[str, tuple[str, ...]] = {
    "refunds": ("refund", "money back", "reimbursement", "chargeback", "returned payment", "repayment"),
    "parcels": ("parcel", "package", "shipment", "delivery", "courier", "cardboard box"),
    "logins": ("login", "password", "sign in page", "passcode", "locked account", "username"),
    "printers": ("printer", "toner", "ink cartridge", "paper jam", "print queue", "blank printout"),
    "invoices": ("invoice", "receipt", "bill", "purchase statement", "overcharge", "tax line"),
    "phones": ("phone", "handset", "sim card", "voicemail", "missed call", "cracked touchscreen"),
    "networks": ("wifi", "router", "broadband", "internet connection", "ethernet cable", "dead hotspot"),
    "contracts": ("contract", "agreement", "renewal clause", "legal terms", "notice period", "signature page"),
    "discounts": ("discount", "coupon", "voucher", "promo code", "loyalty bonus", "gift card"),
    "laptops": ("laptop", "notebook", "keyboard", "trackpad", "docking station", "swollen battery"),
    "emails": ("email", "inbox", "mailbox", "spam folder", "bounced message", "attachment"),
    "meetings": ("meeting", "calendar", "appointment", "video conference", "room booking", "rescheduled demo"),
    "visas": ("visa", "passport", "work permit", "embassy form", "residence card", "immigration letter"),
    "salaries": ("salary", "payslip", "wage", "overtime pay", "yearly raise", "pension share"),
    "holidays": ("holiday", "vacation", "sick leave", "day off", "parental leave", "absence request"),
    "trainings": ("training", "workshop", "course", "webinar", "certificate", "onboarding class"),
    "elevators": ("elevator", "lift", "stairwell door", "cargo hoist", "cabin alarm", "jammed shaft"),
    "kitchens": ("kitchen", "coffee machine", "fridge", "dishwasher", "microwave", "water cooler"),
    "cars": ("car", "van", "parking permit", "flat tyre", "fuel gauge", "engine light"),
    "badges": ("badge", "key fob", "access gate", "visitor pass", "turnstile", "lost lanyard"),
}

DESKS = (
    *("amber", "birch", "cobalt", "delta", "ember", "falcon", "granite", "harbor", "indigo", "juniper", "kestrel"),
    *("lagoon", "maple", "nickel", "onyx", "pebble", "quartz", "raven", "saffron", "tundra", "umber", "violet"),
    *("willow", "zephyr"),
)

GREETINGS = ("", "", "hi,", "hello,", "good morning,", "dear team,", "hey,", "sorry to bother you,")
OWNERS = ("my", "our", "the", "this", "a colleague's", "my manager's")
WHENS = ("", "", "since monday", "since this morning", "again", "for two weeks", "after the update", "as of today")
CLOSINGS = (".", ".", ", please help.", ", thanks.", ", any idea?", ", can somebody look?", ", it is for a client.")

# {it} is what the ticket is about, {other} something it names but is not about.
SHAPES = (
    "{greeting} {owner} {it} is not right {when}{closing}",
    "{greeting} there is a problem with {owner} {it} {when}{closing}",
    "{greeting} I have a question about {owner} {it}{closing}",
    "{greeting} nobody answered me about {owner} {it} {when}{closing}",
    "{greeting} what should I do about {owner} {it}{closing}",
    "{greeting} {owner} {other} is fine, but {owner} {it} is not {when}{closing}",
    "{greeting} this is not about {owner} {other}, it is about {owner} {it}{closing}",
    "{greeting} {owner} {it} needs attention {when}, not {owner} {other}{closing}",
    "{greeting} I wrote about {owner} {it} {when}, forget what I said on {owner} {other}{closing}",
)

PREAMBLE = (
    "you are the front desk of a large company. read the ticket, find out what it is about, look up who takes care "
    "of it, and answer in the words of the handbook, nothing else. handbook:"
)
RULE = "all tickets about {topic} go to #{desk}."
ANSWER = "{topic} #{desk}"
TICKET = "ticket: {input} answer:"
