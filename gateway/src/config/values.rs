//! The small values of the language: durations, sizes, shares, `none`, one-or-many.
//!
//! Each parses from the one spelling that the language has, and says in its
//! error which spelling that is. No value here knows what it is used for.

use std::{borrow::Cow, fmt, marker::PhantomData, time::Duration};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer,
    de::{self, IntoDeserializer, MapAccess, SeqAccess, Visitor, value},
};

/// A duration as the file says it: `250ms`, `5s`, `10m`, `1h`. Zero switches a limit off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

impl Span {
    /// A span of whole seconds, for defaults.
    pub const fn secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// The duration, or nothing where zero switches the limit off.
    pub fn limit(self) -> Option<Duration> {
        (!self.0.is_zero()).then_some(self.0)
    }
}

/// The longest duration that the language takes: a year.
const LONGEST: Duration = Duration::from_hours(8784);

impl std::str::FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("not a duration: `{text}`; write it like `250ms`, `5s`, `10m` or `1h`");
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let millis = match unit {
            "ms" => Some(number),
            "s" => number.checked_mul(1_000),
            "m" => number.checked_mul(60_000),
            "h" => number.checked_mul(3_600_000),
            _ => return Err(wrong()),
        };
        match millis.map(Duration::from_millis) {
            Some(duration) if duration <= LONGEST => Ok(Self(duration)),
            _ => Err(format!("duration too long: `{text}`; the longest is a year")),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        match millis {
            0 => write!(f, "0s"),
            _ if millis.is_multiple_of(3_600_000) => write!(f, "{}h", millis / 3_600_000),
            _ if millis.is_multiple_of(60_000) => write!(f, "{}m", millis / 60_000),
            _ if millis.is_multiple_of(1_000) => write!(f, "{}s", millis / 1_000),
            _ => write!(f, "{millis}ms"),
        }
    }
}

/// A number of bytes: `64KiB`, `10MiB`, `1GiB`, `512B`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("not a size: `{text}`; write it like `512B`, `64KiB`, `10MiB` or `1GiB`");
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let shift = match unit {
            "B" => 0,
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            _ => return Err(wrong()),
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| format!("size too large: `{text}`"))
    }
}

/// A share of requests in buckets of 0.01 %: `10%`, `0.5%`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share(pub u16);

impl std::str::FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("not a share: `{text}`; write it with the sign, like `10%` or `0.5%`");
        let number = text.strip_suffix('%').ok_or_else(wrong)?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if !digits(whole) || !digits(fraction) || whole.len() > 3 {
            return Err(wrong());
        }
        if fraction.len() > 2 {
            return Err(format!("share too fine: `{text}`; the smallest step is `0.01%`"));
        }
        let whole: u16 = whole.parse().map_err(|_| wrong())?;
        let fraction: u16 = format!("{fraction:0<2}").parse().map_err(|_| wrong())?;
        let buckets = whole * 100 + fraction;
        if buckets > 10_000 {
            return Err(format!("share above `100%`: `{text}`"));
        }
        Ok(Self(buckets))
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, fraction) = (self.0 / 100, self.0 % 100);
        match fraction {
            0 => write!(f, "{whole}%"),
            _ if fraction.is_multiple_of(10) => write!(f, "{whole}.{}%", fraction / 10),
            _ => write!(f, "{whole}.{fraction:02}%"),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        match units.into_iter().find(|(unit, _)| self.0 > 0 && self.0.is_multiple_of(*unit)) {
            Some((unit, name)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}B", self.0),
        }
    }
}

/// Deserialises from a string by `FromStr`; `$what` ends the sentence "expected …".
macro_rules! from_string {
    ($type:ty, $what:literal, $pattern:literal) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl Visitor<'_> for Text {
                    type Value = $type;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($what)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Text)
            }
        }
        impl JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }
            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({"type": "string", "pattern": $pattern, "title": $what})
            }
        }
    };
}
from_string!(Span, "a duration like `5s`", r"^[0-9]+(ms|s|m|h)$|\$\{");
from_string!(Size, "a size like `64KiB`", r"^[0-9]+(B|KiB|MiB|GiB)$|\$\{");
from_string!(Share, "a share like `10%`", r"^[0-9]{1,3}(\.[0-9]{1,2})?%$|\$\{");

/// A policy or the word `none`, which switches off what `defaults` or the built-in default say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OrNone<T> {
    /// The word `none`.
    None,
    /// The policy.
    Some(T),
}

impl<T> OrNone<T> {
    /// The policy, if it is not `none`.
    pub fn as_option(&self) -> Option<&T> {
        match self {
            Self::None => None,
            Self::Some(value) => Some(value),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OrNone<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Either<T> {
            type Value = OrNone<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the policy's keys, or `none`")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                if text == "none" {
                    return Ok(OrNone::None);
                }
                T::deserialize(text.into_deserializer()).map(OrNone::Some)
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(value::MapAccessDeserializer::new(map)).map(OrNone::Some)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
                T::deserialize(value::SeqAccessDeserializer::new(seq)).map(OrNone::Some)
            }
        }
        deserializer.deserialize_any(Either(PhantomData))
    }
}

impl<T: JsonSchema> JsonSchema for OrNone<T> {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        format!("{}OrNone", T::schema_name()).into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let policy = generator.subschema_for::<T>();
        json_schema!({"anyOf": [policy, {"const": "none"}]})
    }
}

/// A value that has a short form, a string, beside its full form, a map.
pub trait ShortForm: Sized {
    /// What the short form is, for "expected …".
    const WHAT: &'static str;
    /// The full form that a short one stands for.
    fn from_short(text: &str) -> Result<Self, String>;
}

/// Deserialises `T` from its short or its full form, through one visitor that keeps the location.
pub fn short_or_full<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: ShortForm + Deserialize<'de>,
    D: Deserializer<'de>,
{
    struct Either<T>(PhantomData<T>);
    impl<'de, T: ShortForm + Deserialize<'de>> Visitor<'de> for Either<T> {
        type Value = T;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(T::WHAT)
        }
        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            T::from_short(text).map_err(E::custom)
        }
        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(value::MapAccessDeserializer::new(map))
        }
    }
    deserializer.deserialize_any(Either(PhantomData))
}

/// The schema of a value that has a short form.
pub fn short_or_full_schema<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    let full = generator.subschema_for::<T>();
    json_schema!({"anyOf": [{"type": "string"}, full]})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_sizes_and_shares_have_one_spelling() {
        assert_eq!("250ms".parse(), Ok(Span(Duration::from_millis(250))));
        assert_eq!("1h".parse(), Ok(Span::secs(3600)));
        for wrong in ["", "5", "s", "1.5s", "5 s", "-1s", "1d", "99999999999999999999s", "9000h"] {
            assert!(wrong.parse::<Span>().is_err(), "{wrong}");
        }
        assert_eq!("64KiB".parse(), Ok(Size(65536)));
        for wrong in ["", "64", "64KB", "64 KiB", "99999999999GiB"] {
            assert!(wrong.parse::<Size>().is_err(), "{wrong}");
        }
        assert_eq!("10%".parse(), Ok(Share(1000)));
        assert_eq!("0.5%".parse(), Ok(Share(50)));
        assert_eq!("0.01%".parse(), Ok(Share(1)));
        assert_eq!("100%".parse(), Ok(Share(10_000)));
        for wrong in ["", "%", "10", "101%", "0.001%", "-1%", ".5%", "5.%", "1e1%", "100.01%", "9999%"] {
            assert!(wrong.parse::<Share>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn values_print_as_they_are_written() {
        for text in ["250ms", "5s", "10m", "1h", "0s"] {
            assert_eq!(text.parse::<Span>().map(|s| s.to_string()), Ok(text.to_owned()));
        }
        for text in ["0B", "100B", "64KiB", "10MiB", "1GiB"] {
            assert_eq!(text.parse::<Size>().map(|s| s.to_string()), Ok(text.to_owned()));
        }
        for text in ["10%", "0.5%", "0.01%", "12.34%", "100%", "0%"] {
            assert_eq!(text.parse::<Share>().map(|s| s.to_string()), Ok(text.to_owned()));
        }
    }
}
