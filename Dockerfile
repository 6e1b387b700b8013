# Two stages: the first builds, the second has what runs. What is installed is pinned by hash in requirements/; scripts/image.sh has the steps,
# which tests/helm runs, too. Another base, by tag or digest: --build-arg PYTHON=...
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS build
WORKDIR /src
COPY . .
RUN scripts/image.sh build /dist
RUN scripts/image.sh install /opt/spillway /dist

FROM ${PYTHON}
LABEL org.opencontainers.image.title="Spillway" org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 spillway && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin spillway
RUN install --directory --owner=10001 --group=10001 --mode=0750 /var/lib/spillway
COPY --from=build /opt/spillway /opt/spillway
ENV PATH=/opt/spillway/bin:/usr/local/bin:/usr/bin:/bin
ENV PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /var/lib/spillway
EXPOSE 7070 7071
ENTRYPOINT ["/opt/spillway/bin/spillway"]
CMD ["serve"]
