//! What one segment of a path looks like: a name that somebody chose, or one of many.
//!
//! Pure, and only ever a first guess: names that turn out to be many are told by how many there are (`tree`).

/// A segment of this length or more is one of many.
const LONG: usize = 48;

/// What a segment looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A number, a UUID, a hash, a date, a token: one of many, whatever else is seen.
    Id,
    /// A page with its file's name, such as `login.php`.
    Page,
    /// A word, such as `orders` or `orderItems`.
    Word,
    /// Anything else: `blue-shirt`, `v2`, `app.3f2a.js`.
    Slug,
}

/// Kinds that are literals until there are too many of them, in the order of their counters.
pub(super) const KINDS: usize = 3;

impl Kind {
    /// Its counter, and how many there may be beside each other before it is asked whether they are names at all.
    pub fn limit(self) -> Option<(usize, u16)> {
        match self {
            Self::Id => None,
            Self::Page => Some((0, 512)),
            Self::Word => Some((1, 128)),
            Self::Slug => Some((2, 24)),
        }
    }
}

/// Ends of files that stand for what a server does, not for something that it has.
const PAGES: [&str; 14] =
    ["php", "html", "htm", "jsp", "jspx", "do", "action", "asp", "aspx", "ashx", "asmx", "cgi", "pl", "cfm"];

/// What a segment looks like.
pub fn kind(segment: &str) -> Kind {
    let bytes = segment.as_bytes();
    if bytes.len() >= LONG || is_id(bytes) {
        return Kind::Id;
    }
    let is_word = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'_');
    match segment.rsplit_once('.') {
        Some((name, end)) if PAGES.contains(&end) && is_stem(name) => Kind::Page,
        None if is_word(segment) && bytes.len() <= 24 => Kind::Word,
        _ => Kind::Slug,
    }
}

/// Whether it may be the name of a file with a program in it: not an address, not a sentence.
fn is_stem(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphabetic() || b"_-".contains(&byte))
}

/// Whether it is a number, a UUID, a hash, a date, or a token of letters and digits as machines make them.
fn is_id(bytes: &[u8]) -> bool {
    let digits = bytes.iter().filter(|byte| byte.is_ascii_digit()).count();
    if digits == 0 {
        return false;
    }
    // Numbers, dates, times, decimals, telephone numbers.
    if bytes.iter().all(|byte| byte.is_ascii_digit() || b"-+.,:_".contains(byte)) {
        return true;
    }
    // UUIDs and hashes, also in braces.
    let inner = bytes.strip_prefix(b"{").and_then(|rest| rest.strip_suffix(b"}")).unwrap_or(bytes);
    let hex = inner.iter().all(|byte| byte.is_ascii_hexdigit() || *byte == b'-');
    let letters = bytes.iter().filter(|byte| byte.is_ascii_alphabetic()).count();
    if hex && inner.len() >= 8 && digits >= 2 {
        return true;
    }
    // ULIDs, KSUIDs, object ids with a prefix: long, without a separator that people put between words.
    let run = bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    if run && bytes.len() >= 16 && digits >= 3 {
        return true;
    }
    // A letter or two before many digits: `ord_1234567`, `AB-123456`.
    digits >= 4
        && letters + digits >= bytes.len() - 1
        && bytes.iter().rev().take_while(|b| b.is_ascii_digit()).count() >= 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_what_machines_make() {
        for id in [
            "1",
            "42",
            "2026-11-28",
            "12.5",
            "6f9619ff-8b86-d011-b42d-00cf4fc964ff",
            "{6F9619FF-8B86-D011-B42D-00CF4FC964FF}",
            "da39a3ee5e6b4b0d3255bfef95601890afd80709",
            "5f2b1c9e",
            "01ARZ3NDEKTSV4RRFFQ69G5FAV",
            "507f1f77bcf86cd799439011",
            "ord_1234567",
            "AB-123456",
            "cus_9s6XKzkNRiz8i3",
            "+4915112345678",
            "aVeryLongSegmentThatNobodyWouldEverChooseForTheNameOfAnything",
        ] {
            assert_eq!(kind(id), Kind::Id, "{id}");
        }
        for (text, expected) in [
            ("orders", Kind::Word),
            ("orderItems", Kind::Word),
            ("order_items", Kind::Word),
            ("facade", Kind::Word),
            ("login.php", Kind::Page),
            ("index.html", Kind::Page),
            ("v1", Kind::Slug),
            ("oauth2", Kind::Slug),
            ("blue-shirt", Kind::Slug),
            (".well-known", Kind::Slug),
            ("app.3f2a.js", Kind::Slug),
            ("jan.kowalski@example.pl", Kind::Slug),
            ("caf\u{e9}", Kind::Slug),
            ("2fa", Kind::Slug),
            ("", Kind::Word),
        ] {
            assert_eq!(kind(text), expected, "{text}");
        }
    }
}
