//! `Cache-Control` (RFC 9111 §5.2) and its targeted kind (RFC 9213), read as those who wrote them may have meant it.
//!
//! What cannot be read is never taken for permission: a bad number is none (stale), a conflict is its smaller side.

use http::HeaderValue;

/// The longest time that is told apart (RFC 9111 §1.2.2).
const FOREVER: u64 = 1 << 31;

/// The directives that mean something here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "the directives are what they are")]
pub struct CacheControl {
    /// `max-age`
    pub max_age: Option<u64>,
    /// `s-maxage`
    pub s_maxage: Option<u64>,
    /// `stale-while-revalidate`
    pub stale_while_revalidate: Option<u64>,
    /// `stale-if-error`
    pub stale_if_error: Option<u64>,
    /// `min-fresh`
    pub min_fresh: Option<u64>,
    /// `max-stale`; without a number any.
    pub max_stale: Option<u64>,
    /// `no-store`
    pub no_store: bool,
    /// `no-cache`, with or without names of fields.
    pub no_cache: bool,
    /// `private`, with or without names of fields.
    pub private: bool,
    /// `public`
    pub public: bool,
    /// `must-revalidate`
    pub must_revalidate: bool,
    /// `proxy-revalidate`
    pub proxy_revalidate: bool,
    /// `must-understand`
    pub must_understand: bool,
    /// `only-if-cached`
    pub only_if_cached: bool,
    /// Whether there was any directive.
    pub said: bool,
}

impl CacheControl {
    /// What all lines of a field say together.
    pub fn of<'v>(lines: impl IntoIterator<Item = &'v HeaderValue>) -> Self {
        let mut this = Self::default();
        for line in lines {
            let mut rest = line.as_bytes();
            // A text that does not end may hide anything.
            this.no_store |= is_open(rest);
            while !rest.is_empty() {
                let (name, value, after) = directive(rest);
                this.take(name, value);
                rest = after;
            }
        }
        this
    }

    fn take(&mut self, name: &[u8], value: Option<&[u8]>) {
        self.said |= !name.is_empty();
        // Of two the smaller, of none that can be read nothing.
        let number = |slot: &mut Option<u64>| {
            let found = value.map_or(0, seconds);
            *slot = Some(slot.map_or(found, |known| known.min(found)));
        };
        match name.to_ascii_lowercase().as_slice() {
            b"max-age" => number(&mut self.max_age),
            b"s-maxage" => number(&mut self.s_maxage),
            b"stale-while-revalidate" => number(&mut self.stale_while_revalidate),
            b"stale-if-error" => number(&mut self.stale_if_error),
            b"min-fresh" => number(&mut self.min_fresh),
            b"max-stale" if value.is_none() => self.max_stale = Some(FOREVER),
            b"max-stale" => number(&mut self.max_stale),
            b"no-store" => self.no_store = true,
            b"no-cache" => self.no_cache = true,
            b"private" => self.private = true,
            b"public" => self.public = true,
            b"must-revalidate" => self.must_revalidate = true,
            b"proxy-revalidate" => self.proxy_revalidate = true,
            b"must-understand" => self.must_understand = true,
            b"only-if-cached" => self.only_if_cached = true,
            _ => {}
        }
    }

    /// What all lines of a targeted field say together; nothing where they are no dictionary (RFC 9213 §2.1): then the field is as
    /// good as not there.
    pub fn targeted<'v>(lines: impl IntoIterator<Item = &'v HeaderValue>) -> Option<Self> {
        let lines: Vec<&[u8]> = lines.into_iter().map(HeaderValue::as_bytes).collect();
        if lines.is_empty() {
            return None;
        }
        let all = lines.join(&b","[..]);
        let mut this = Self::default();
        let mut rest = all.trim_ascii();
        while !rest.is_empty() {
            let (name, item, after) = member(rest)?;
            match item {
                // A later one replaces an earlier (RFC 9651 §4.2.2).
                Item::Integer(number) => {
                    this.forget(name);
                    this.take(name, Some(number.to_string().as_bytes()));
                }
                Item::True if !is_timed(name) => this.take(name, None),
                // What forbids, forbids whatever it says beside; of what allows, a type that it does not have says nothing.
                Item::Other if !is_timed(name) && name != b"public" => this.take(name, None),
                Item::True | Item::Other | Item::False => {}
            }
            rest = after.trim_ascii_start();
            if let Some(after) = rest.strip_prefix(b",") {
                rest = after.trim_ascii_start();
                if rest.is_empty() {
                    return None;
                }
            } else if !rest.is_empty() {
                return None;
            }
        }
        this.said.then_some(this)
    }

    fn forget(&mut self, name: &[u8]) {
        match name {
            b"max-age" => self.max_age = None,
            b"s-maxage" => self.s_maxage = None,
            b"stale-while-revalidate" => self.stale_while_revalidate = None,
            b"stale-if-error" => self.stale_if_error = None,
            _ => {}
        }
    }
}

fn is_timed(name: &[u8]) -> bool {
    matches!(name, b"max-age" | b"s-maxage" | b"stale-while-revalidate" | b"stale-if-error")
}

/// Whether a quoted text in it has no end.
fn is_open(text: &[u8]) -> bool {
    let (mut quoted, mut escaped) = (false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ => {}
        }
    }
    quoted
}

/// A number of seconds; none where it is no such.
pub fn seconds(text: &[u8]) -> u64 {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return 0;
    }
    std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).unwrap_or(FOREVER).min(FOREVER)
}

/// The first directive of a list: its name, its value without quotes, and what follows the comma.
fn directive(text: &[u8]) -> (&[u8], Option<&[u8]>, &[u8]) {
    let mut quoted = false;
    let mut escaped = false;
    let mut equals = None;
    let mut end = text.len();
    for (at, byte) in text.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'=' if !quoted && equals.is_none() => equals = Some(at),
            b',' if !quoted => {
                end = at;
                break;
            }
            _ => {}
        }
    }
    let after = text.get(end + 1..).unwrap_or_default();
    match equals {
        // A blank before the `=` makes it another name.
        Some(at) => (text[..at].trim_ascii_start(), Some(unquoted(text[at + 1..end].trim_ascii_end())), after),
        None => (text[..end].trim_ascii(), None, after),
    }
}

fn unquoted(value: &[u8]) -> &[u8] {
    value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value)
}

/// A dictionary's value, as far as it matters.
enum Item {
    Integer(u64),
    True,
    False,
    Other,
}

/// The first member of a dictionary (RFC 9651 §4.2.2), and what follows it.
fn member(text: &[u8]) -> Option<(&[u8], Item, &[u8])> {
    let (name, rest) = key(text)?;
    let (item, rest) = match rest.strip_prefix(b"=") {
        Some(rest) => bare_item(rest)?,
        None => (Item::True, rest),
    };
    Some((name, item, parameters(rest)?))
}

fn key(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let first = text.first()?;
    let valid = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-.*".contains(byte);
    (first.is_ascii_lowercase() || *first == b'*')
        .then(|| text.split_at(text.iter().position(|byte| !valid(byte)).unwrap_or(text.len())))
}

fn bare_item(text: &[u8]) -> Option<(Item, &[u8])> {
    let until = |holds: fn(&u8) -> bool| text.split_at(text.iter().position(|byte| !holds(byte)).unwrap_or(text.len()));
    match text.first()? {
        b'0'..=b'9' | b'-' => {
            let (number, rest) = until(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'-'));
            let digits = number.strip_prefix(b"-").unwrap_or(number);
            if digits.is_empty() || digits.len() > 16 || !digits.iter().all(|b| b.is_ascii_digit() || *b == b'.') {
                return None;
            }
            let whole = number.len() == digits.len() && digits.iter().all(u8::is_ascii_digit) && digits.len() <= 15;
            Some((if whole { Item::Integer(seconds(number)) } else { Item::Other }, rest))
        }
        b'?' => match text.get(1)? {
            b'1' => Some((Item::True, &text[2..])),
            b'0' => Some((Item::False, &text[2..])),
            _ => None,
        },
        b'"' => {
            let mut at = 1;
            loop {
                match text.get(at)? {
                    b'\\' => at += 2,
                    b'"' => return Some((Item::Other, &text[at + 1..])),
                    0x20..=0x7e => at += 1,
                    _ => return None,
                }
            }
        }
        b'@' => bare_item(&text[1..]).map(|(_, rest)| (Item::Other, rest)),
        b'(' => {
            let mut rest = text[1..].trim_ascii_start();
            loop {
                if let Some(rest) = rest.strip_prefix(b")") {
                    return Some((Item::Other, rest));
                }
                // A list in a list is none.
                if rest.starts_with(b"(") {
                    return None;
                }
                rest = parameters(bare_item(rest)?.1)?.trim_ascii_start();
            }
        }
        byte if byte.is_ascii_alphabetic() || *byte == b'*' => {
            let (_, rest) = until(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~:/".contains(byte));
            Some((Item::Other, rest))
        }
        _ => None,
    }
}

fn parameters(mut text: &[u8]) -> Option<&[u8]> {
    while let Some(rest) = text.strip_prefix(b";") {
        let (_, rest) = key(rest.trim_ascii_start())?;
        text = match rest.strip_prefix(b"=") {
            Some(rest) => bare_item(rest)?.1,
            None => rest,
        };
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&'static str]) -> CacheControl {
        let lines: Vec<_> = lines.iter().map(|line| HeaderValue::from_static(line)).collect();
        CacheControl::of(&lines)
    }

    /// RFC 9111 §5.2, §4.2.1.
    #[test]
    fn directives_are_read_as_they_were_meant() {
        assert_eq!(read(&["max-age=60"]).max_age, Some(60));
        assert_eq!(read(&["MAX-AGE=60, Public"]).max_age, Some(60));
        assert!(read(&["MAX-AGE=60, Public"]).public);
        assert_eq!(read(&["max-age=\"60\""]).max_age, Some(60));
        assert_eq!(read(&["a=b,, max-age=60 ,"]).max_age, Some(60));
        assert_eq!(read(&["a=\"x, max-age=1\", max-age=60"]).max_age, Some(60));
        assert_eq!(read(&["a=\"\\\", max-age=1\", max-age=60"]).max_age, Some(60));
        assert_eq!(read(&["public", "max-age=60"]).max_age, Some(60));
        assert_eq!(read(&["max-age=99999999999999999999"]).max_age, Some(FOREVER));
        // Two that disagree, and what is no number.
        assert_eq!(read(&["max-age=60, max-age=5"]).max_age, Some(5));
        for bad in ["max-age", "max-age=", "max-age=-1", "max-age=1.5", "max-age='60'", "max-age= 60", "max-age=60s"] {
            assert_eq!(read(&[bad]).max_age, Some(0), "{bad}");
        }
        // Another name.
        assert_eq!(read(&["max-age =60"]).max_age, None);
        assert_eq!(read(&["xmax-age=60"]).max_age, None);
        assert!(read(&["private=\"set-cookie\", no-cache=\"a, b\""]).private);
        assert!(read(&["private=\"set-cookie\", no-cache=\"a, b\""]).no_cache);
        assert_eq!(read(&["max-stale"]).max_stale, Some(FOREVER));
        assert!(!read(&[""]).said);
        assert!(read(&["max-age=60, a=\"x, no-store"]).no_store);
    }

    /// RFC 9213 §2.1: a dictionary of RFC 9651, or nothing.
    #[test]
    fn a_targeted_field_is_a_dictionary_or_nothing() {
        let read = |text: &'static str| CacheControl::targeted(&[HeaderValue::from_static(text)]);
        assert_eq!(read("max-age=60").unwrap().max_age, Some(60));
        assert!(read("no-store").unwrap().no_store);
        assert!(!read("no-store=?0, max-age=1").unwrap().no_store);
        assert_eq!(read("max-age=60;a=b;c, a=\"x, y\", b=tok/en").unwrap().max_age, Some(60));
        assert_eq!(read("max-age=60, max-age=90").unwrap().max_age, Some(90));
        assert_eq!(read("a=(1 \"x\" y;z=1), b=@1, max-age=60").unwrap().max_age, Some(60));
        assert!(read("max-age=60, private=\"a\"").unwrap().private);
        assert!(read("max-age=60, no-cache=(a b)").unwrap().no_cache);
        // Wrong types say nothing of that directive.
        assert_eq!(read("max-age=\"60\", public").unwrap().max_age, None);
        assert_eq!(read("max-age=1.5, public").unwrap().max_age, None);
        assert_eq!(read("max-age, public").unwrap().max_age, None);
        for bad in [
            "",
            "max-age=60, &&&",
            "Max-Age=60",
            "max-age=60,",
            "max-age =60",
            "max-age=60 a",
            "a=\"x",
            "=1",
            "a=(1",
            "a=((1))",
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
