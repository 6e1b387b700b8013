{{- define "spillway.probe" -}}
grpc:
  port: {{ int .port }}
  service: {{ .name }}
periodSeconds: {{ int .of.periodSeconds }}
failureThreshold: {{ int .of.failureThreshold }}
timeoutSeconds: {{ int .of.timeoutSeconds }}
{{- end }}

{{- define "spillway.nodeSpec" -}}
{{- $v := .Values }}
{{- $spread := list (dict "topologyKey" "topology.kubernetes.io/zone" "when" $v.topology.zoneSpread) (dict "topologyKey" "kubernetes.io/hostname" "when" $v.topology.hostSpread) }}
{{- with $v.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
serviceAccountName: {{ include "spillway.serviceAccount" . }}
automountServiceAccountToken: false
# A service called spillway would add variables that look like settings.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ int $v.terminationGracePeriodSeconds }}
{{- with $v.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
securityContext:
  {{- include "spillway.podSecurity" . | nindent 2 }}
topologySpreadConstraints:
  {{- range $spread }}
  - maxSkew: 1
    topologyKey: {{ .topologyKey }}
    whenUnsatisfiable: {{ .when }}
    labelSelector:
      matchLabels:
        {{- include "spillway.nodes" $ | nindent 8 }}
  {{- end }}
{{- with $v.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: spillway
    image: {{ include "spillway.image" . }}
    imagePullPolicy: {{ $v.image.pullPolicy }}
    command: [/opt/spillway/bin/spillway, serve]
    args:
      - --config=/etc/spillway/config/$(POD_NAME).toml
      {{- range $v.extraArgs }}
      - {{ . | quote }}
      {{- end }}
    env:
      - name: POD_NAME
        valueFrom:
          fieldRef:
            fieldPath: metadata.name
      # For the commands of preStop and of whoever looks around in the pod.
      - name: SPILLWAY_NODE_ID
        value: $(POD_NAME)
      - name: SPILLWAY_ADDRESS
        value: $(POD_NAME).{{ include "spillway.domain" . }}:{{ int $v.ports.client }}
      {{- if $v.topology.host }}
      - name: SPILLWAY_HOST
        valueFrom:
          fieldRef:
            fieldPath: spec.nodeName
      {{- end }}
      {{- with $v.topology.zoneLabel }}
      - name: SPILLWAY_ZONE
        valueFrom:
          fieldRef:
            fieldPath: metadata.labels['{{ . }}']
      {{- end }}
      - name: HOME
        value: /tmp
      {{- include "spillway.clientEnv" . | nindent 6 }}
      {{- if and $v.tls.clients.enabled $v.tls.clients.requireClientCertificate }}
      - name: SPILLWAY_TLS_CERT
        value: /etc/spillway/tls/clients/tls.crt
      - name: SPILLWAY_TLS_KEY
        value: /etc/spillway/tls/clients/tls.key
      {{- end }}
      {{- with $v.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    ports:
      - name: client
        containerPort: {{ int $v.ports.client }}
      - name: peer
        containerPort: {{ int $v.ports.peer }}
      - name: probe
        containerPort: {{ int $v.ports.probe }}
      {{- if $v.metrics.enabled }}
      - name: metrics
        containerPort: {{ int $v.ports.metrics }}
      {{- end }}
    startupProbe:
      {{- include "spillway.probe" (dict "port" $v.ports.probe "name" "startup" "of" $v.probes.startup) | nindent 6 }}
    readinessProbe:
      {{- include "spillway.probe" (dict "port" $v.ports.probe "name" "readiness" "of" $v.probes.readiness) | nindent 6 }}
    livenessProbe:
      {{- include "spillway.probe" (dict "port" $v.ports.probe "name" "liveness" "of" $v.probes.liveness) | nindent 6 }}
    lifecycle:
      preStop:
        exec:
          # Node and address come from the environment.
          command: [/opt/spillway/bin/spillway, cluster, stoppable, --wait, "{{ int $v.preStop.waitSeconds }}s", --settle, "{{ int $v.preStop.settleSeconds }}s"]
    resources:
      {{- toYaml $v.resources | nindent 6 }}
    securityContext:
      {{- include "spillway.containerSecurity" . | nindent 6 }}
    volumeMounts:
      - name: data
        mountPath: /var/lib/spillway
      - name: config
        mountPath: /etc/spillway/config
        readOnly: true
      - name: tmp
        mountPath: /tmp
      {{- if $v.tls.clients.enabled }}
      - name: clients-tls
        mountPath: /etc/spillway/tls/clients
        readOnly: true
      {{- end }}
      {{- if $v.tls.peers.enabled }}
      - name: peers-tls
        mountPath: /etc/spillway/tls/peers
        readOnly: true
      {{- end }}
      {{- if ne $v.auth.mode "none" }}
      - name: token
        mountPath: /etc/spillway/token
        readOnly: true
      {{- if $v.auth.jwt.jwksSecret }}
      - name: jwt
        mountPath: /etc/spillway/jwt
        readOnly: true
      {{- end }}
      {{- end }}
      {{- with $v.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
  {{- with $v.extraContainers }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
volumes:
  - name: config
    configMap:
      name: {{ include "spillway.fullname" . }}
  - name: tmp
    emptyDir:
      sizeLimit: 64Mi
  {{- if $v.tls.clients.enabled }}
  - name: clients-tls
    secret:
      secretName: {{ include "spillway.clientsSecret" . }}
      defaultMode: 0440
  {{- end }}
  {{- if $v.tls.peers.enabled }}
  - name: peers-tls
    secret:
      secretName: {{ include "spillway.peersSecret" . }}
      defaultMode: 0440
  {{- end }}
  {{- if ne $v.auth.mode "none" }}
  - name: token
    secret:
      secretName: {{ include "spillway.adminTokenSecret" . }}
      defaultMode: 0440
  {{- if $v.auth.jwt.jwksSecret }}
  - name: jwt
    secret:
      secretName: {{ $v.auth.jwt.jwksSecret }}
      defaultMode: 0440
  {{- end }}
  {{- end }}
  {{- with $v.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
