//! Bodies as they come in (RFC 9112 §6 and §7): what belongs to a message, and where it ends.

use bytes::{Buf as _, Bytes, BytesMut};
use http::HeaderMap;

use super::head::{Framing, Refused, parse_trailers};

/// Trailers of one message, at most, in bytes.
const MAX_TRAILERS: usize = 16 * 1024;
/// Extensions of one chunk, at most, in bytes. Nobody uses them.
const MAX_EXTENSION: u32 = 1024;
/// Digits of a chunk's size, at most: enough for 64 bits less one.
const MAX_DIGITS: u32 = 15;

/// What comes out of a body.
#[derive(Debug)]
pub enum Decoded {
    /// Some of it.
    Data(Bytes),
    /// Its end, with fields.
    Trailers(HeaderMap),
    /// Its end.
    End,
    /// Nothing before more bytes come.
    More,
}

/// Where in a body the next byte belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoder {
    /// So many bytes are left.
    Length(u64),
    /// In the frame of a chunk.
    Chunked(Chunk),
    /// All that comes belongs to it.
    Close,
    /// It is over.
    Done,
}

/// Where in the frame of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// In its size: the number so far, and how many digits it has.
    Size(u64, u32),
    /// In blanks after the size, which only an extension may follow.
    Blank(u64, u32),
    /// In an extension: so many bytes of it.
    Extension(u64, u32),
    /// Before the LF of the size's line.
    SizeLf(u64),
    /// In its data.
    Data(u64),
    /// Before the CR after its data.
    DataCr,
    /// Before the LF after its data.
    DataLf,
    /// In the trailers: how many bytes were looked at in vain.
    Trailers(usize),
}

impl Decoder {
    /// The decoder of a message's body.
    pub fn new(framing: Framing) -> Self {
        match framing {
            Framing::None | Framing::Length(0) => Self::Done,
            Framing::Length(length) => Self::Length(length),
            Framing::Chunked => Self::Chunked(Chunk::Size(0, 0)),
            Framing::Close => Self::Close,
        }
    }

    /// Whether the body is over.
    pub fn is_done(self) -> bool {
        self == Self::Done
    }

    /// How many bytes are certainly still to come, where that is known.
    pub fn expects(self) -> Option<u64> {
        match self {
            Self::Length(left) | Self::Chunked(Chunk::Data(left)) => Some(left),
            Self::Done => Some(0),
            Self::Chunked(_) | Self::Close => None,
        }
    }

    /// Takes what belongs to the body out of what was read.
    pub fn decode(&mut self, bytes: &mut BytesMut) -> Result<Decoded, Refused> {
        loop {
            match self {
                Self::Done => return Ok(Decoded::End),
                _ if bytes.is_empty() => return Ok(Decoded::More),
                Self::Close => return Ok(Decoded::Data(bytes.split().freeze())),
                Self::Length(left) => {
                    let data = take(bytes, *left);
                    *left -= data.len() as u64;
                    if *left == 0 {
                        *self = Self::Done;
                    }
                    return Ok(Decoded::Data(data));
                }
                Self::Chunked(Chunk::Data(left)) => {
                    let data = take(bytes, *left);
                    *left -= data.len() as u64;
                    if *left == 0 {
                        *self = Self::Chunked(Chunk::DataCr);
                    }
                    return Ok(Decoded::Data(data));
                }
                Self::Chunked(Chunk::Trailers(seen)) => {
                    return match trailers(bytes, *seen)? {
                        None => {
                            *seen = bytes.len();
                            Ok(Decoded::More)
                        }
                        Some(trailers) => {
                            *self = Self::Done;
                            Ok(if trailers.is_empty() { Decoded::End } else { Decoded::Trailers(trailers) })
                        }
                    };
                }
                Self::Chunked(chunk) => {
                    // A frame is short; each byte has one place in it.
                    let byte = bytes[0];
                    *chunk = chunk.step(byte)?;
                    bytes.advance(1);
                }
            }
        }
    }
}

impl Chunk {
    fn step(self, byte: u8) -> Result<Self, Refused> {
        let malformed = Err(Refused::Malformed("malformed chunk"));
        Ok(match (self, byte) {
            (Self::Size(size, digits), _) if byte.is_ascii_hexdigit() => {
                if digits == MAX_DIGITS {
                    return malformed;
                }
                let digit = (byte as char).to_digit(16).unwrap_or_default();
                Self::Size(size * 16 + u64::from(digit), digits + 1)
            }
            (Self::Size(_, 0), _) => return malformed,
            (Self::Size(size, _) | Self::Extension(size, _), b'\r') => Self::SizeLf(size),
            (Self::Size(size, _) | Self::Blank(size, _), b';') => Self::Extension(size, 0),
            (Self::Size(size, _), b' ' | b'\t') => Self::Blank(size, 1),
            (Self::Blank(size, blanks), b' ' | b'\t') if blanks < MAX_EXTENSION => Self::Blank(size, blanks + 1),
            (Self::Extension(size, length), _)
                if length < MAX_EXTENSION && (byte == b'\t' || !byte.is_ascii_control()) =>
            {
                Self::Extension(size, length + 1)
            }
            (Self::SizeLf(0), b'\n') => Self::Trailers(0),
            (Self::SizeLf(size), b'\n') => Self::Data(size),
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::Size(0, 0),
            _ => return malformed,
        })
    }
}

fn take(bytes: &mut BytesMut, left: u64) -> Bytes {
    let whole = bytes.len();
    let data = match usize::try_from(left) {
        Ok(left) if left < whole => bytes.split_to(left),
        _ => std::mem::take(bytes),
    };
    data.freeze()
}

fn trailers(bytes: &mut BytesMut, seen: usize) -> Result<Option<HeaderMap>, Refused> {
    if bytes.starts_with(b"\r\n") {
        bytes.advance(2);
        return Ok(Some(HeaderMap::new()));
    }
    if !super::head::is_whole(bytes, seen)? {
        let over = bytes.len() > MAX_TRAILERS;
        return if over { Err(Refused::Malformed("the trailers are too large")) } else { Ok(None) };
    }
    let parsed = parse_trailers(bytes, MAX_TRAILERS).map_err(|refused| {
        if refused == Refused::Fields { Refused::Malformed("the trailers are too large") } else { refused }
    })?;
    Ok(parsed.map(|(trailers, length)| {
        bytes.advance(length);
        trailers
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds a body in pieces; its data, its trailers, and what is left over.
    fn decode(framing: Framing, bytes: &[u8], piece: usize) -> Result<(Vec<u8>, HeaderMap, Vec<u8>), Refused> {
        let mut decoder = Decoder::new(framing);
        let mut buffer = BytesMut::new();
        let mut data = Vec::new();
        let mut trailers = HeaderMap::new();
        for piece in bytes.chunks(piece) {
            buffer.extend_from_slice(piece);
            loop {
                match decoder.decode(&mut buffer)? {
                    Decoded::Data(more) => data.extend_from_slice(&more),
                    Decoded::Trailers(fields) => trailers = fields,
                    Decoded::End | Decoded::More => break,
                }
            }
        }
        if !decoder.is_done() {
            return Err(Refused::Malformed("unfinished"));
        }
        Ok((data, trailers, buffer.to_vec()))
    }

    #[test]
    fn chunks_are_read_in_any_pieces() {
        let body = b"3\r\nabc\r\n00A;x=\"y z\";q\r\n0123456789\r\n1 ;e\r\n.\r\n0\r\nX-Sum: 7\r\nhost: b\r\n\r\nrest";
        for piece in 1..=body.len() {
            let (data, trailers, rest) = decode(Framing::Chunked, body, piece).unwrap();
            assert_eq!(data, b"abc0123456789.");
            assert_eq!(trailers.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["x-sum"]);
            assert_eq!(rest, b"rest");
        }
    }

    #[test]
    fn what_is_no_chunk_is_refused() {
        for bad in [
            &b"\r\nabc"[..],
            b"g\r\n",
            b"0x3\r\nabc\r\n0\r\n\r\n",
            b"+3\r\nabc\r\n0\r\n\r\n",
            b"-3\r\nabc\r\n0\r\n\r\n",
            b" 3\r\nabc\r\n0\r\n\r\n",
            b"3 \r\nabc\r\n0\r\n\r\n",
            b"3\nabc\r\n0\r\n\r\n",
            b"3\rabc\r\n0\r\n\r\n",
            b"3;\nabc\r\n0\r\n\r\n",
            b"3;a\x00b\r\nabc\r\n0\r\n\r\n",
            b"3;a\rb\r\nabc\r\n0\r\n\r\n",
            b"3\r\nabcd\r\n0\r\n\r\n",
            b"3\r\nabc0\r\n\r\n",
            b"3\r\nabc\n0\r\n\r\n",
            b"10000000000000000\r\nabc",
            b"0000000000000003\r\nabc",
            b"3_0\r\nabc",
            b"0\r\nbad\r\n\r\n",
            b"0\r\nbad : x\r\n\r\n",
            b"0\r\na: b\r\n c\r\n\r\n",
            b"0\r\na: b\n\r\n",
            b"0\r\na: b\x01\r\n\r\n",
        ] {
            for piece in [1, 3, bad.len()] {
                let result = decode(Framing::Chunked, bad, piece);
                assert!(
                    matches!(result, Err(Refused::Malformed(why)) if why != "unfinished"),
                    "{:?} in pieces of {piece}: {result:?}",
                    String::from_utf8_lossy(bad)
                );
            }
        }
        let long = [b"3;".to_vec(), vec![b'x'; 2000]].concat();
        assert!(decode(Framing::Chunked, &long, 100).is_err());
        let large = [b"0\r\nx: ".to_vec(), vec![b'x'; 20_000], b"\r\n\r\n".to_vec()].concat();
        assert_eq!(
            decode(Framing::Chunked, &large, 100).unwrap_err(),
            Refused::Malformed("the trailers are too large")
        );
    }

    #[test]
    fn a_length_takes_just_its_bytes() {
        for piece in 1..8 {
            assert_eq!(decode(Framing::Length(5), b"abcdefg", piece).unwrap().0, b"abcde");
        }
        assert!(decode(Framing::Length(9), b"abc", 1).is_err());
        assert_eq!(decode(Framing::None, b"x", 1).unwrap().0, b"");
    }
}
