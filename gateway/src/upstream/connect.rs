//! Making a connection: name, TCP, TLS, within one time limit.

use std::{
    fmt, io,
    net::{SocketAddr, ToSocketAddrs as _},
    path::Path,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
};

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use twox_hash::XxHash3_64;

use super::{Upstream, endpoint::Endpoint};
use crate::{
    config::{is_same_listener, read_ca},
    error::{Error, Kind},
};

/// How connections to an upstream are encrypted, but for the name that is checked.
pub struct Roots {
    config: Arc<ClientConfig>,
    /// Of the authorities' text.
    id: u64,
}

/// How connections to an endpoint are encrypted: the name checked is the one in the file.
pub struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
    roots: u64,
}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Roots").field("id", &self.id).finish_non_exhaustive()
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Roots {
    /// Trusts the authorities of a file, or the system's.
    pub fn new(ca: Option<&Path>) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        let mut id = 0;
        match ca {
            Some(path) => {
                for certificate in read_ca(path)? {
                    id = XxHash3_64::oneshot_with_seed(id, &certificate);
                    roots.add(certificate).map_err(|error| format!("{}: {error}", path.display()))?;
                }
            }
            None => {
                roots.add_parsable_certificates(system_roots().iter().cloned());
            }
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { config: Arc::new(config), id })
    }

    /// For an endpoint whose certificate must have this name.
    pub(super) fn named(&self, host: &str) -> Result<Tls, String> {
        let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
        Ok(Tls { connector: TlsConnector::from(self.config.clone()), name, roots: self.id })
    }
}

impl Tls {
    /// Whether these are the authorities that it trusts.
    pub(super) fn is_of(&self, roots: &Roots) -> bool {
        self.roots == roots.id
    }
}

/// The system's authorities, read once a process.
fn system_roots() -> &'static [CertificateDer<'static>] {
    static ROOTS: OnceLock<Vec<CertificateDer<'static>>> = OnceLock::new();
    ROOTS.get_or_init(|| rustls_native_certs::load_native_certs().certs)
}

/// A connection to an upstream.
pub enum Io {
    /// In the clear.
    Plain(TcpStream),
    /// Encrypted.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Drop for Io {
    /// Says goodbye on an encrypted connection, as far as the socket takes it at once (RFC 9112 §9.8).
    fn drop(&mut self) {
        if let Self::Tls(tls) = self {
            let (tcp, session) = tls.get_mut();
            session.send_close_notify();
            let mut farewell = Vec::new();
            if session.write_tls(&mut farewell).is_ok() {
                let _ = tcp.try_write(&farewell);
            }
        }
    }
}

impl Io {
    /// The socket below.
    pub fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(tcp) => tcp,
            Self::Tls(tls) => tls.get_ref().0,
        }
    }

    /// Whether bytes on the socket are more than the messages.
    pub fn is_encrypted(&self) -> bool {
        matches!(self, Self::Tls(_))
    }
}

/// Connects.
pub async fn connect(upstream: &Upstream, endpoint: &Endpoint) -> Result<Io, Error> {
    let fail = |kind, detail: &dyn fmt::Display| Error::upstream(kind, &upstream.name, false, detail);
    let limit = upstream.connections.connect_timeout;
    match tokio::time::timeout(limit, dial(upstream, endpoint)).await {
        Ok(Ok(io)) => Ok(io),
        Ok(Err((kind, detail))) => Err(fail(kind, &detail)),
        Err(_) => Err(fail(Kind::ConnectTimeout, &format!("{}: no connection within {limit:?}", endpoint.name))),
    }
}

async fn dial(upstream: &Upstream, endpoint: &Endpoint) -> Result<Io, (Kind, String)> {
    let tcp = match endpoint.address {
        Some(ip) => dial_one(upstream, SocketAddr::new(ip, endpoint.url.port)).await?,
        None => dial_name(upstream, endpoint).await?,
    };
    // Without it, a small write behind another waits for a delayed acknowledgement.
    let _ = tcp.set_nodelay(true);
    let Some(tls) = &endpoint.tls else {
        return Ok(Io::Plain(tcp));
    };
    match tls.connector.connect(tls.name.clone(), tcp).await {
        Ok(stream) => Ok(Io::Tls(Box::new(stream))),
        Err(error) => {
            let certificate = error
                .get_ref()
                .and_then(|inner| inner.downcast_ref::<rustls::Error>())
                .is_some_and(|inner| matches!(inner, rustls::Error::InvalidCertificate(_)));
            Err((if certificate { Kind::Certificate } else { Kind::Tls }, error.to_string()))
        }
    }
}

/// Tries the addresses of a name in order.
async fn dial_name(upstream: &Upstream, endpoint: &Endpoint) -> Result<TcpStream, (Kind, String)> {
    let host = endpoint.url.host.as_str();
    let addresses = look_up(upstream, endpoint).await.map_err(|error| (Kind::Dns, format!("{host}: {error}")))?;
    let mut last = (Kind::Dns, format!("{host}: no address"));
    for address in addresses {
        match dial_one(upstream, address).await {
            Ok(tcp) => return Ok(tcp),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Asks the system. Its call cannot be cancelled, so the place is given back only when it returns: a name server that
/// hangs holds a few threads, not all.
async fn look_up(upstream: &Upstream, endpoint: &Endpoint) -> io::Result<Vec<SocketAddr>> {
    let place = upstream.lookups.clone().acquire_owned().await.map_err(io::Error::other)?;
    let asked = (endpoint.url.host.clone(), endpoint.url.port);
    let asking = tokio::task::spawn_blocking(move || {
        let _place = place;
        asked.to_socket_addrs().map(Iterator::collect)
    });
    asking.await.map_err(io::Error::other)?
}

async fn dial_one(upstream: &Upstream, address: SocketAddr) -> Result<TcpStream, (Kind, String)> {
    if upstream.prohibited.load().iter().any(|own| is_same_listener(*own, address)) {
        return Err((Kind::IpProhibited, format!("{address} is a listener of this gateway")));
    }
    TcpStream::connect(address).await.map_err(|error| {
        let kind = match error.kind() {
            io::ErrorKind::ConnectionRefused => Kind::ConnectionRefused,
            io::ErrorKind::TimedOut => Kind::ConnectTimeout,
            _ => Kind::Unreachable,
        };
        (kind, format!("{address}: {error}"))
    })
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write_vectored(cx, bufs),
            Self::Tls(tls) => Pin::new(tls).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(tcp) => tcp.is_write_vectored(),
            Self::Tls(tls) => tls.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}
