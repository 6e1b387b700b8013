{{/* The name that all objects begin with; pods add "-13" at most, the controller's revisions 11 characters. */}}
{{- define "spillway.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 45 | trimSuffix "-" }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 45 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 45 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "spillway.headless" -}}
{{ include "spillway.fullname" . }}-nodes
{{- end }}

{{/* What pods are selected by, and what stands in templates that never may change: constant over versions. */}}
{{- define "spillway.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "spillway.nodes" -}}
{{ include "spillway.selector" . }}
app.kubernetes.io/component: node
{{- end }}

{{- define "spillway.dispatchers" -}}
{{ include "spillway.selector" . }}
app.kubernetes.io/component: dispatcher
{{- end }}

{{/* Labels of objects. */}}
{{- define "spillway.labels" -}}
{{ include "spillway.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "spillway.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end }}
{{- end }}
{{- end }}

{{- define "spillway.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "spillway.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* The domain of the pods' names. */}}
{{- define "spillway.domain" -}}
{{ include "spillway.headless" . }}.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}
{{- end }}

{{- define "spillway.serviceName" -}}
{{ include "spillway.fullname" . }}.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}
{{- end }}

{{/* Where clients inside the Kubernetes cluster find the service. */}}
{{- define "spillway.address" -}}
{{ include "spillway.serviceName" . }}:{{ .Values.service.port }}
{{- end }}

{{- define "spillway.clientsSecret" -}}
{{ .Values.tls.clients.secretName | default (printf "%s-clients-tls" (include "spillway.fullname" .)) }}
{{- end }}

{{- define "spillway.clientSecret" -}}
{{ .Values.tls.clients.clientSecretName | default (printf "%s-client-tls" (include "spillway.fullname" .)) }}
{{- end }}

{{- define "spillway.peersSecret" -}}
{{ .Values.tls.peers.secretName | default (printf "%s-peers-tls" (include "spillway.fullname" .)) }}
{{- end }}

{{- define "spillway.adminTokenSecret" -}}
{{ .Values.auth.adminTokenSecret | default (printf "%s-admin-token" (include "spillway.fullname" .)) }}
{{- end }}

{{/* A value as TOML has it. Numbers of values come as floats; whole ones must be written as such. */}}
{{- define "spillway.toml" -}}
{{- if or (kindIs "float64" .) (kindIs "int" .) (kindIs "int64" .) -}}
{{- if eq (float64 .) (float64 (int64 .)) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end }}

{{/* The settings that all nodes share, as a map. */}}
{{- define "spillway.settings" -}}
{{- $v := .Values }}
{{- $out := dict
  "cluster" $v.clusterName
  "listen" (printf "%s:%d" $v.listenHost (int $v.ports.client))
  "peer_listen" (printf "%s:%d" $v.listenHost (int $v.ports.peer))
  "probe_listen" (printf "%s:%d" $v.listenHost (int $v.ports.probe))
  "data_dir" "/var/lib/spillway/node"
  "shards" $v.shards
  "replicas" $v.shardReplicas
  "log_level" $v.log.level }}
{{- with $v.log.format }}{{ $_ := set $out "log_format" . }}{{ end }}
{{- if $v.metrics.enabled }}{{ $_ := set $out "metrics_listen" (printf "%s:%d" $v.listenHost (int $v.ports.metrics)) }}{{ end }}
{{- with $v.tracing.otlpEndpoint }}{{ $_ := set $out "otlp_endpoint" . }}{{ end }}
{{- if not (eq (toString $v.tracing.sampleRatio) "") }}{{ $_ := set $out "trace_sample_ratio" $v.tracing.sampleRatio }}{{ end }}
{{- if $v.tls.clients.enabled }}
{{- $_ := set $out "tls_cert" "/etc/spillway/tls/clients/tls.crt" }}
{{- $_ := set $out "tls_key" "/etc/spillway/tls/clients/tls.key" }}
{{- if $v.tls.clients.requireClientCertificate }}{{ $_ := set $out "tls_client_ca" "/etc/spillway/tls/clients/ca.crt" }}{{ end }}
{{- end }}
{{- if $v.tls.peers.enabled }}
{{- $_ := set $out "peer_tls_cert" "/etc/spillway/tls/peers/tls.crt" }}
{{- $_ := set $out "peer_tls_key" "/etc/spillway/tls/peers/tls.key" }}
{{- $_ := set $out "peer_tls_ca" "/etc/spillway/tls/peers/ca.crt" }}
{{- end }}
{{- if ne $v.auth.mode "none" }}
{{- $_ := set $out "auth" $v.auth.mode }}
{{- $_ := set $out "admin_token_file" "/etc/spillway/token/token" }}
{{- if $v.auth.jwt.jwksSecret }}
{{- $_ := set $out "jwt_jwks_file" "/etc/spillway/jwt/jwks.json" }}
{{- with $v.auth.jwt.issuer }}{{ $_ := set $out "jwt_issuer" . }}{{ end }}
{{- with $v.auth.jwt.audience }}{{ $_ := set $out "jwt_audience" . }}{{ end }}
{{- end }}
{{- end }}
{{- if $v.allowInsecure }}{{ $_ := set $out "allow_insecure" true }}{{ end }}
{{- range $name, $value := $v.config }}
{{- if or (hasKey $out $name) (has $name (list "node_id" "peers" "join" "advertise")) }}
{{- fail (printf "config.%s: the chart sets it itself; use the value that is meant for it" $name) }}
{{- end }}
{{- $_ := set $out $name $value }}
{{- end }}
{{- toJson $out }}
{{- end }}

{{/* What the commands of the client need to reach the cluster: environment. */}}
{{- define "spillway.clientEnv" -}}
{{- if .Values.tls.clients.enabled }}
- name: SPILLWAY_TLS_CA
  value: /etc/spillway/tls/clients/ca.crt
{{- end }}
{{- if ne .Values.auth.mode "none" }}
- name: SPILLWAY_TOKEN_FILE
  value: /etc/spillway/token/token
{{- end }}
{{- end }}

{{/* The same, for pods that are no nodes: they have certificates of their own. */}}
{{- define "spillway.clientCertificateEnv" -}}
{{- if and .Values.tls.clients.enabled .Values.tls.clients.requireClientCertificate }}
- name: SPILLWAY_TLS_CERT
  value: /etc/spillway/tls/client/tls.crt
- name: SPILLWAY_TLS_KEY
  value: /etc/spillway/tls/client/tls.key
{{- end }}
{{- end }}

{{- define "spillway.clientMounts" -}}
- name: tmp
  mountPath: /tmp
{{- if .Values.tls.clients.enabled }}
- name: clients-ca
  mountPath: /etc/spillway/tls/clients
  readOnly: true
{{- if .Values.tls.clients.requireClientCertificate }}
- name: client-tls
  mountPath: /etc/spillway/tls/client
  readOnly: true
{{- end }}
{{- end }}
{{- if ne .Values.auth.mode "none" }}
- name: token
  mountPath: /etc/spillway/token
  readOnly: true
{{- end }}
{{- end }}

{{/* Volumes of what clientMounts mounts: (list . NAME), where NAME is the secret with the pod's token. */}}
{{- define "spillway.clientVolumes" -}}
{{- $ := index . 0 }}
- name: tmp
  emptyDir:
    sizeLimit: 64Mi
{{- if $.Values.tls.clients.enabled }}
- name: clients-ca
  secret:
    secretName: {{ include "spillway.clientsSecret" $ }}
    items:
      - key: ca.crt
        path: ca.crt
{{- if $.Values.tls.clients.requireClientCertificate }}
- name: client-tls
  secret:
    secretName: {{ include "spillway.clientSecret" $ }}
    defaultMode: 0440
{{- end }}
{{- end }}
{{- if ne $.Values.auth.mode "none" }}
- name: token
  secret:
    secretName: {{ index . 1 }}
    defaultMode: 0440
{{- end }}
{{- end }}

{{- define "spillway.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.runAsUser }}
runAsGroup: {{ int64 .Values.runAsUser }}
fsGroup: {{ int64 .Values.runAsUser }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "spillway.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* One file of settings for each node that there may ever be, so that one more node changes nothing for the others. */}}
{{- define "spillway.files" -}}
{{- $settings := include "spillway.settings" . | fromJson }}
{{- $name := include "spillway.fullname" . }}
{{- $domain := include "spillway.domain" . }}
{{- $peer := int .Values.ports.peer }}
{{- $client := int .Values.ports.client }}
{{- $founders := int .Values.founders }}
{{- $peers := list }}
{{- $seeds := list }}
{{- range $ordinal := until (max 3 $founders | int) }}
{{- $host := printf "%s-%d.%s" $name $ordinal $domain }}
{{- if or (lt $ordinal $founders) (eq $founders 0) }}
{{- $seeds = append $seeds (printf "%s:%d" $host $peer) }}
{{- end }}
{{- if lt $ordinal $founders }}
{{- $peers = append $peers (printf "%s-%d=%s:%d/%s:%d" $name $ordinal $host $peer $host $client) }}
{{- end }}
{{- end }}
{{- range $ordinal := until 14 }}
{{ $name }}-{{ $ordinal }}.toml: |
  node_id = "{{ $name }}-{{ $ordinal }}"
  {{- if and (lt $ordinal $founders) (gt $founders 1) }}
  peers = {{ toJson $peers }}
  {{- else }}
  {{- $host := printf "%s-%d.%s" $name $ordinal $domain }}
  advertise = "{{ $host }}:{{ $peer }}/{{ $host }}:{{ $client }}"
  {{- if ge $ordinal $founders }}
  join = {{ toJson (without $seeds (printf "%s:%d" $host $peer)) }}
  {{- end }}
  {{- end }}
  {{- range $key, $value := $settings }}
  {{ $key }} = {{ include "spillway.toml" $value }}
  {{- end }}
{{- end }}
{{- end }}
