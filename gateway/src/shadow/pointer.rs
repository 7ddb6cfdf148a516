//! JSON Pointers (RFC 6901) with `*` for any one member and a final `**` for all below.

/// A pointer, or many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Name(Box<str>),
    Any,
    Below,
}

/// One step into a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<'j> {
    /// A member of an object.
    Name(&'j str),
    /// An element of an array.
    Index(usize),
}

impl Pattern {
    /// Reads one, or says what to write.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if text.is_empty() {
            return Ok(Self { parts: Vec::new() });
        }
        let Some(rest) = text.strip_prefix('/') else {
            return Err("a pointer begins with `/`, like `/items/*/price`");
        };
        let mut parts = Vec::new();
        let segments: Vec<&str> = rest.split('/').collect();
        for (n, segment) in segments.iter().enumerate() {
            parts.push(match *segment {
                "*" => Part::Any,
                "**" if n + 1 == segments.len() => Part::Below,
                "**" => return Err("`**` takes all below, so it stands last"),
                name => Part::Name(unescape(name).ok_or("write `~0` for `~` and `~1` for `/`")?.into()),
            });
        }
        Ok(Self { parts })
    }

    /// Whether a place is meant.
    pub fn matches(&self, path: &[Step<'_>]) -> bool {
        let mut path = path.iter();
        for part in &self.parts {
            match (part, path.next()) {
                (Part::Below, _) => return true,
                (Part::Any, Some(_)) => {}
                (Part::Name(name), Some(Step::Name(step))) if **name == **step => {}
                (Part::Name(name), Some(Step::Index(index))) if name.parse() == Ok(*index) => {}
                _ => return false,
            }
        }
        path.next().is_none()
    }
}

fn unescape(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(char) = chars.next() {
        match char {
            '~' => out.push(match chars.next()? {
                '0' => '~',
                '1' => '/',
                _ => return None,
            }),
            char => out.push(char),
        }
    }
    Some(out)
}

/// Whether a member's name is one, and not an id, an address or a text: those are many, and somebody's.
fn is_name(name: &str) -> bool {
    let digits = name.bytes().filter(u8::is_ascii_digit).count();
    (1..=40).contains(&name.len())
        && digits <= 4
        && digits * 2 <= name.len()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.$:~/ ".contains(&byte))
}

/// The pointer to a place; `*` for each index, so that all elements of an array are one field, and for members whose names are none.
pub fn write(path: &[Step<'_>]) -> String {
    let mut out = String::new();
    for step in path {
        out.push('/');
        match step {
            Step::Index(_) => out.push('*'),
            Step::Name(name) if !is_name(name) => out.push('*'),
            Step::Name(name) => out.push_str(&name.replace('~', "~0").replace('/', "~1")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, path: &[Step<'_>]) -> bool {
        Pattern::parse(pattern).unwrap().matches(path)
    }

    #[test]
    fn names_wildcards_and_all_below() {
        use Step::{Index, Name};
        assert!(matches("/items/*/price", &[Name("items"), Index(3), Name("price")]));
        assert!(matches("/items/3/price", &[Name("items"), Index(3), Name("price")]));
        assert!(!matches("/items/*/price", &[Name("items"), Index(3)]));
        assert!(!matches("/items/*", &[Name("items"), Index(3), Name("price")]));
        assert!(matches("/items/**", &[Name("items"), Index(3), Name("price")]));
        assert!(matches("/items/**", &[Name("items")]));
        assert!(matches("/a~1b/~0c", &[Name("a/b"), Name("~c")]));
        assert!(matches("", &[]) && !matches("", &[Name("a")]) && matches("/", &[Name("")]));
        for wrong in ["items", "/a/**/b", "/a~", "/a~2"] {
            assert!(Pattern::parse(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        /// What is reported can be written into `ignore:` as it is.
        #[test]
        fn a_written_pointer_finds_its_place(names in proptest::collection::vec("[a-z~/]{0,4}", 0..5)) {
            let path: Vec<Step<'_>> = names.iter().map(|name| Step::Name(name)).collect();
            prop_assert!(Pattern::parse(&write(&path)).unwrap().matches(&path));
        }
    }
}
